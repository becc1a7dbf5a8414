//! `stagehost:stage/producer`: what a stage emits, held until its message is done.
