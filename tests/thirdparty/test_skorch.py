"""skorch: NeuralNetClassifier builds the module, fits it and clones it, as scikit-learn does."""

import numpy as np
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, EpochScoring
from torch import nn
