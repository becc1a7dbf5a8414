//! Problems of a pipeline file, shown with their place as rustc shows them.
