//! Requests to a server, over a network that loses them, their answers, or delivers them late.

use std::pin::Pin;

use super::process::Process;
use super::{World, pause};

/// No answer will come, and nobody here knows whether the request arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lost;

enum Fate {
    Fine,
    NeverArrives,
    AnswerLost,
    Late,
}

/// Sends a request, whose work the server does even if nobody waits for it any more.
pub(crate) async fn request<T: Send + 'static>(
    process: &Process,
    what: &'static str,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Lost> {
    let world = process.world();
    process.point(what).await;
    let fate = fate(world);
    let mut wire = Wire {
        world: world.clone(),
        work: Some(Box::pin(work)),
    };
    world.travel().await;
    match fate {
        Fate::NeverArrives => {
            wire.work = None;
            return Err(Lost);
        }
        Fate::Late => {
            wire.go_on_late();
            return Err(Lost);
        }
        Fate::Fine | Fate::AnswerLost => {}
    }
    let answer = wire.finish().await;
    process.point(what).await;
    world.travel().await;
    match fate {
        Fate::AnswerLost => Err(Lost),
        _ => Ok(answer),
    }
}

fn fate(world: &World) -> Fate {
    let lost = world.weather().lost;
    if lost == 0 {
        return Fate::Fine;
    }
    match world.roll(0..=999) {
        n if n < lost => Fate::NeverArrives,
        n if n < 2 * lost => Fate::AnswerLost,
        n if n < 3 * lost => Fate::Late,
        _ => Fate::Fine,
    }
}

/// What is on its way to the server, or being worked on there.
struct Wire<T: Send + 'static> {
    world: World,
    work: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
}

impl<T: Send + 'static> Wire<T> {
    async fn finish(&mut self) -> T {
        let work = self.work.as_mut().expect("it was not done before");
        let answer = work.await;
        self.work = None;
        answer
    }

    fn go_on_late(&mut self) {
        if let Some(work) = self.work.take() {
            let delay = self.world.roll(0..=self.world.weather().late);
            self.world.spawn(async move {
                pause(delay).await;
                work.await;
            });
        }
    }
}

/// Whoever asked is gone: what was sent may arrive all the same.
impl<T: Send + 'static> Drop for Wire<T> {
    fn drop(&mut self) {
        if self.work.is_some() && !self.world.is_over() && self.world.one_in(2) {
            self.go_on_late();
        }
    }
}
