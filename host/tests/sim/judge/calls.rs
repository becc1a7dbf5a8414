//! How often messages were delivered, and what came of them.

use host::pipeline::OnExhausted;

use super::Outcome;
use crate::topology::{Kind, Script};
use crate::world::evidence::Calls;

impl Outcome {
    /// Whether a message has come to what its script says. Whatever cost it deliveries may have used up its attempts.
    pub(super) fn judge_verdict(
        &mut self,
        stage: usize,
        id: &str,
        effects: bool,
        cause: Option<&String>,
    ) {
        let max = self.topology.stages[stage].max_attempts;
        let script = self.topology.script(stage, id);
        if effects && !script.succeeds(max) {
            self.anomaly(
                "wrong-verdict",
                stage,
                format!("{id} has effects, and is {script:?}"),
            );
        }
        let Some(cause) = cause.filter(|_| !effects && script.succeeds(max)) else {
            return;
        };
        // Nobody can tell which message of a call a refused output belongs to, unless it is undone with its call.
        let spec = &self.topology.stages[stage];
        if spec.batches && spec.kind == Kind::Ordered && spec.mix.refused_outputs > 0 {
            return;
        }
        let spent = script.retries(max) + self.costs[stage];
        if cause != "retries-exhausted" || spent < max {
            let what = format!("{id} is given up on for {cause}, and is {script:?}");
            self.anomaly("wrong-verdict", stage, what);
        }
    }

    /// A message is not delivered more often than it may.
    pub(super) fn judge_calls(&mut self, stage: usize) {
        let spec = &self.topology.stages[stage];
        let (max, batches) = (spec.max_attempts, spec.batches);
        let disturbed = self.disturbances[stage];
        // Where attempts are not kept, whatever ends a lane begins them anew.
        let more = match spec.kind {
            // One that has stopped tries once more when its partition is assigned again.
            Kind::Transactional(_) if spec.on_exhausted == OnExhausted::Stop => {
                disturbed + self.moves
            }
            Kind::Transactional(_) => disturbed,
            Kind::Ordered => (disturbed + self.moves) * max,
        };
        let calls: Vec<_> = (self.calls.iter())
            .filter(|((of, ..), _)| *of == stage)
            .map(|(_, calls)| calls.clone())
            .collect();
        for calls in calls {
            let Calls {
                id,
                retries,
                highest_attempt,
            } = calls;
            let script = self.topology.script(stage, &id);
            if highest_attempt > max {
                let what = format!("{id} had attempt {highest_attempt} of {max}");
                self.anomaly("too-many-attempts", stage, what);
            }
            // A call with many messages asks again for all of them; one that took long is made again.
            let is_exact = !batches && !self.hasty;
            if is_exact && retries > script.retries(max) + more {
                let what = format!("{id} asked {retries} times for another of {max} deliveries");
                self.anomaly("too-many-attempts", stage, what);
            }
            let own = match script {
                Script::KillsConnection => max,
                _ => retries,
            };
            if highest_attempt > 1 + own + more {
                let what = format!("{id} had attempt {highest_attempt} after {own} that counted");
                self.anomaly("miscounted-attempts", stage, what);
            }
        }
    }
}
