//! Writes each message into `effects`, which takes it any number of times, does as told, and passes it on.

use stagehost::{Fault, Message, Outcome, Outgoing, config, params, sql};

fn write(message: Message) -> Outcome {
    let told: serde_json::Value = message.json()?;
    let (key, lane) = (told["key"].as_str(), config::require("lane")?);
    let effects = sql::Connection::open("effects")?;
    effects.execute(
        "INSERT INTO effects (lane, key, seq) VALUES ($1, $2, $3)",
        &params![&lane, key, told["seq"].as_i64()],
    )?;
    match told["do"].as_str().filter(|_| told["at"] == lane) {
        Some("reject") => return Err(Fault::reject("as told")),
        Some("retry") if message.attempt < 3 => return Err(Fault::retry("as told")),
        Some("trap") => panic!("as told"),
        Some("spin") => loop {
            std::hint::spin_loop();
        },
        Some("fail-caught") => match effects.execute("INSERT INTO taken VALUES (1)", &[]) {
            Err(sql::Error::Database(e)) if e.sqlstate.as_deref() == Some("23505") => {}
            other => drop(other?),
        },
        _ => {}
    }
    let to = config::require("to")?;
    Ok(Outgoing::json(to, key.unwrap_or_default(), &told)?.send()?)
}

stagehost::stage!(write);
