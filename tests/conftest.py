import os
import sys
from pathlib import Path

# the same suite on a machine with a GPU, whose results differ in the last digits
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent))
matplotlib.use("Agg")
torch.set_num_threads(1)
