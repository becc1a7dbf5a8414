//! The parts of the delivery loop that have rules of their own.
