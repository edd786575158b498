"""Networks: the built-in ones, and what every network needs: building, device, modes, attention."""
