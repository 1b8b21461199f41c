"""Training jobs larger than this machine: what every rank would hold, send and compute, and the published scaling laws.

`placement` says where each tensor of the model lies, `activations` what autograd keeps, `memory`, `traffic` and `roofline` add
these up, `search` looks for a mesh. Only `placement` builds the model (on meta devices) and imports torch, when it runs.
"""
