"""Networks: our own by name, anybody's by ``torchvision:name``, ``pkg.mod:factory`` or ``path/to/file.py:factory``."""
