"""``python driver.py CONFIG.yaml``: one training run as a process of its own, to be killed or started in numbers."""

import sys

from omegaconf import OmegaConf

from natrain.training import train

if __name__ == "__main__":
    print(train(OmegaConf.load(sys.argv[1])))
