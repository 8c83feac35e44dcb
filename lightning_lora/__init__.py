"""Fine-tune text classifiers with LoRA on PyTorch Lightning.

Data flows one way: config -> data -> model -> training -> evaluation -> artifacts -> reports.
"""

__version__ = "0.1.0"
