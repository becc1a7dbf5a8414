//! The delivery loop of one lane: one stage on one assigned partition.
