//! What a component file is, what it imports and exports.
