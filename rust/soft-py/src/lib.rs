//! Python face
