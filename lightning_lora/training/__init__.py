"""The LightningModule with its one step, the optimizer and its schedule, what is shown while training."""
