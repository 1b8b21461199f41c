"""From a GQA teacher to the hybrid: plan, calibrate, convert, warm up, measure. Importing this package loads no torch."""
