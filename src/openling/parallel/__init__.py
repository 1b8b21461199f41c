"""One model on many ranks: the mesh, the placement table beside the model, and how both are applied."""
