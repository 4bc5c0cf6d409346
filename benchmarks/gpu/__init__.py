"""Check of a GPU machine: parity with the published code, exact resume, and speed."""
