"""Other people's formats: LeRobot, npz, zarr."""
