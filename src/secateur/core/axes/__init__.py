"""Which slices of which tensors live and die together: atoms, one rule per operator, the program that proves it."""
