"""PCI Express: configuration space, MSI-X, the host bridge."""
