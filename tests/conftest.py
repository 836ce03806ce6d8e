"""Two cores are shared by everything the suite starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
