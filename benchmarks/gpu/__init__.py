"""A check of a GPU machine: same numbers as the published code, exact resuming, and speed."""
