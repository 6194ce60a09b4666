"""Device code: `@triton.jit` functions only. Nothing here knows torch; launches stand in `fusedlstm.engines.launch`."""
