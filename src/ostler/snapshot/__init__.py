"""Running guests as data: the state's schema, snapshots on disk, and what a guest is made of again from them."""
