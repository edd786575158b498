"""Networks as C99 code without dependencies, for microcontrollers and anything else with a C compiler."""
