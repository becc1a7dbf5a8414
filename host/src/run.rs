//! A running pipeline: assembles log, stores, lanes and listeners, and takes them down again.
