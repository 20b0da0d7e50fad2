import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent))
matplotlib.use("Agg")
torch.set_num_threads(1)
