//! Case by case: outcomes, modes and properties the sweep cannot see.
