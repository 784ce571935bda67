"""From a specification to a wired virtual machine."""
