"""The names and argument orders of the code published with the paper: `codec` and `scrub`."""
