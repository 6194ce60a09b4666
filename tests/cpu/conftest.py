import os

import torch

# Tests run side by side, and threads that spin wait for each other: on a busy machine two take up to a hundred times as
# long as one. Processes that a test starts inherit the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
