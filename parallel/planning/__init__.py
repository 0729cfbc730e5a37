"""What the model is, what the machine is, and the plan that joins them. No torch anywhere in this folder."""
