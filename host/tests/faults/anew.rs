//! An input is deleted and made anew: its lanes stop and say what mends it, and that is then done. What was processed of the
//! old one stays so, and all of the new one is processed from its first record on.

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};

use crate::bench::Bench;
use crate::conductor::Run;
use crate::judge::Anomaly;
use crate::offsets::{self, admin, patiently};
use crate::pipeline::{BOOKED, BOOKS, BOOKS_PARTITIONS, PASSER};
use crate::reader;
use crate::said::Words;
use crate::schedule::Round;

impl Run {
    /// The books are worked off, deleted and made anew, and written on. The mend is to remove the lanes' rows and the groups'
    /// offsets, which are of the topic that is gone.
    pub(crate) fn make_anew(&mut self, round: &Round) {
        // A lane that has read nothing yet has nothing to say.
        if !self.are_settled() {
            return;
        }
        self.books.pause();
        if let Err(behind) = offsets::until_worked_off(&self.bench, &self.lag) {
            let what = format!("the books are not worked off: {behind}");
            self.found.add(Anomaly::Stalled, || what);
            self.books.go_on();
            return;
        }
        let deed = match round.rough {
            true => "books made anew, hosts running",
            false => "books made anew, hosts stopped",
        };
        self.tally.add(deed);
        let listening = self.under(round, make_books_anew);
        self.books.go_on();
        self.must_say(&listening, deed, &Words::MADE_ANEW);
        // What is written meanwhile is none of what the judge asks about.
        self.books.pause();
        let anew = self.while_stopped(|bench| {
            let group = BOOKED.group;
            let delete = format!("DELETE FROM stagehost_progress WHERE consumer_group = '{group}'");
            bench.sql(&bench.addresses.effects, &delete);
            forget_groups(bench);
            reader::topic(&bench.addresses.brokers, BOOKS)
        });
        self.anew
            .extend(anew.into_iter().map(|record| record.message.id()));
        self.books.go_on();
    }
}

fn make_books_anew(bench: &Bench) {
    let (admin, options) = (admin(bench), AdminOptions::new());
    patiently("a topic is deleted", || {
        bench
            .runtime
            .block_on(admin.delete_topics(&[BOOKS], &options))
    });
    let partitions = i32::try_from(BOOKS_PARTITIONS).expect("a few");
    // Until it is gone, there is one of its name.
    patiently("a topic is made anew", || {
        let new = NewTopic::new(BOOKS, partitions, TopicReplication::Fixed(1));
        let made = bench
            .runtime
            .block_on(admin.create_topics([&new], &options));
        let made = made.map_err(|error| error.to_string())?;
        let made = made.into_iter().next().expect("an answer");
        made.map_err(|(topic, code)| format!("{topic}: {code}"))
    });
}

/// Both groups read nothing else.
fn forget_groups(bench: &Bench) {
    let (admin, options) = (admin(bench), AdminOptions::new());
    for group in [BOOKED.group, PASSER.group] {
        patiently("a group's offsets are removed", || {
            let removed = bench
                .runtime
                .block_on(admin.delete_groups(&[group], &options));
            let removed = removed.map_err(|error| error.to_string())?;
            let removed = removed.into_iter().next().expect("an answer");
            match removed {
                // Its offsets went with the topic, and with them the group.
                Ok(_) | Err((_, rdkafka::types::RDKafkaErrorCode::GroupIdNotFound)) => Ok(()),
                Err((group, code)) => Err(format!("{group}: {code}")),
            }
        });
    }
}
