"""Networks on the hardware they are meant for."""
