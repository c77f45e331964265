"""Which slices of which tensors live together: atoms, one rule per operator, the proving program."""
