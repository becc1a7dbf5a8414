//! Changes the title of a post in JSON and passes it on, to the topic that the setting `output` names: for benchmarks.

stagehost::stage!(test_guests::pass::on_rewritten);
