"""Lives here so that ``from families import ...`` works in every test; keeps torch to one thread a test process."""

import torch

torch.set_num_threads(1)
