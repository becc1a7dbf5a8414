//! Passes on what it gets, to the topic that the setting `output` names: for benchmarks.

stagehost::stage!(test_guests::pass::on);
