"""What the environments are worth: reference scores, sweeps, speed."""
