"""Fast grouped and depthwise 3D convolutions for PyTorch models, swapped in place of ``nn.Conv3d``."""
