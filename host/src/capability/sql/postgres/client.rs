//! A session: statements that it has prepared, and one exchange at a time.
//!
//! Everything happens where it is awaited: nothing goes on in a task of its own, so a dropped exchange is a connection that
//! is not at rest, which its pool closes.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::BufMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::Oid;
use postgres_protocol::message::backend::{
    DataRowBody, ErrorResponseBody, Message, RowDescriptionBody,
};
use postgres_protocol::message::frontend;

use super::super::{Error, Failure, MAX_ANSWER_BYTES, Value};
use super::error::Spoken;
use super::locks::Limits;
use super::plans::{MAX_KEPT_TEXT, Plan, Plans};
use super::value::{self, Column, Kind, Parameters};
use super::wire::{Incoming, Wire};

/// Bytes of the largest message that a statement's answer may have. In an array, a number takes half as much again on its
/// way as it counts for in an answer.
const MAX_MESSAGE_BYTES: usize = MAX_ANSWER_BYTES / 2 * 3 + 64 * 1024;
/// Bytes that are read to the end of an answer which is not wanted any more, so that its transaction can go on. A
/// connection with more to come is closed.
const MAX_UNWANTED_BYTES: usize = 4 * MAX_ANSWER_BYTES;
/// Bytes of the largest message that the host's own statements may be answered, a lane's row.
const MAX_ROW_BYTES: usize = 1024 * 1024 * 1024;
/// A setting that the server tells of whenever it changes.
const QUOTES: &str = "standard_conforming_strings";
/// Messages after which others get their turn, however much there is to read.
const MESSAGES_A_TURN: u32 = 32;

/// A session.
pub(super) struct Client {
    wire: Wire,
    plans: Plans,
    /// The host's own, which no guest's statement finds, whatever its text.
    own_plans: Plans,
    /// Exchanges that are not over.
    open: u32,
    /// Exchanges that go out before what is sent next, and must not fail.
    before: u32,
    /// Commands at the beginning of an exchange, which must not fail either: the server does nothing of what is behind
    /// one that did.
    opening: u32,
    /// There are such commands in what is queued last.
    opens: bool,
    in_transaction: bool,
    /// Whether transactions of this session begin read-only.
    pub(super) reads_only: bool,
    /// The process that serves it, as the server said at the login.
    pub(super) process: i32,
    /// How long the server lets its statements take.
    pub(super) limits: Limits,
    /// It has said that it is of no use any more.
    pub(super) is_spent: bool,
    /// When it was last at rest.
    pub(super) idle_since: Instant,
}

/// Whose statement it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    Guest,
    Host,
}

/// What an exchange came to.
#[derive(Default)]
struct Answer {
    affected: u64,
    columns: Vec<(String, Oid)>,
}

/// Takes a row, or has no use for more.
type Take<'a> = &'a mut (dyn FnMut(&DataRowBody) -> Result<(), Error> + Send);

impl Client {
    pub(super) fn new(mut wire: Wire, process: i32) -> Self {
        (wire.limit, wire.patience) = (MAX_MESSAGE_BYTES, MAX_UNWANTED_BYTES);
        // Where a pooler gives it a session that another one had before, it finds none of that one's statements by its own names.
        let session: u64 = rand::random();
        Self {
            wire,
            plans: Plans::new(format!("g{session:x}_")),
            own_plans: Plans::new(format!("h{session:x}_")),
            open: 0,
            before: 0,
            opening: 0,
            opens: false,
            in_transaction: false,
            reads_only: false,
            process,
            limits: Limits::default(),
            is_spent: false,
            idle_since: Instant::now(),
        }
    }

    /// Whether it has done all that it was asked, and is in no transaction.
    pub(super) fn is_at_rest(&self) -> bool {
        self.open == 0 && !self.in_transaction && self.wire.is_empty()
    }

    pub(super) async fn close(self) {
        self.wire.close().await;
    }

    /// Runs commands of the host's own, which have no parameters and whose rows nobody asks for.
    pub(super) async fn command(&mut self, text: &str) -> Result<(), Failure> {
        self.queue_command(text)?;
        self.flush().await?;
        self.answer(&mut |_| Ok(())).await.map(drop)
    }

    /// The value that a query of the host's own answers, as text. Nothing is prepared for it.
    pub(super) async fn look(&mut self, text: &str) -> Result<Option<String>, Failure> {
        self.queue_command(text)?;
        self.flush().await?;
        let mut value = None;
        let take = &mut |row: &DataRowBody| {
            let first = row.ranges().next().ok().flatten().flatten();
            let bytes = first.and_then(|range| row.buffer().get(range));
            value = bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
            Ok(())
        };
        self.answer(take).await?;
        Ok(value)
    }

    pub(super) fn is_in_transaction(&self) -> bool {
        self.in_transaction
    }

    /// A command of the host's own that goes out before what is sent next. If it fails, the connection is lost to that.
    pub(super) fn queue_before(&mut self, text: &str) -> Result<(), Failure> {
        self.queue_command(text)?;
        self.before += 1;
        Ok(())
    }

    /// Commands of the host's own that go out with what is sent next, which is done only if they are. If one fails, the
    /// connection is lost to that.
    pub(super) fn queue_opening(&mut self, commands: &[&str]) -> Result<(), Failure> {
        let plan = Plan::new(String::new(), Vec::new());
        for command in commands {
            let no_types: [Oid; 0] = [];
            frontend::parse("", command, no_types, &mut self.wire.output).map_err(lost)?;
            self.queue(&plan, &Parameters::default())?;
            self.opening += 1;
            self.opens = true;
        }
        Ok(())
    }

    fn queue_command(&mut self, text: &str) -> Result<(), Failure> {
        if self.opens {
            // A command of this kind is an exchange of its own.
            self.sync();
            self.before += 1;
        }
        frontend::query(text, &mut self.wire.output).map_err(lost)?;
        self.open += 1;
        Ok(())
    }

    /// The plan of a statement with parameters of these types, which is prepared if it is not known.
    pub(super) async fn plan(
        &mut self,
        whose: Whose,
        text: &str,
        types: &[Oid],
    ) -> Result<Arc<Plan>, Failure> {
        if let Some(plan) = self.plans(whose).find(text, types) {
            return Ok(plan);
        }
        let keep = text.len() <= MAX_KEPT_TEXT;
        let (name, evicted) = match keep {
            true => self.plans(whose).make_room(),
            false => {
                let name = self.plans(whose).unkept();
                (name.clone(), Some(name))
            }
        };
        let output = &mut self.wire.output;
        if let Some(evicted) = evicted {
            frontend::close(b'S', &evicted, output).map_err(lost)?;
        }
        frontend::parse(&name, text, types.iter().copied(), output).map_err(lost)?;
        frontend::describe(b'S', &name, output).map_err(lost)?;
        self.sync();
        self.flush().await?;
        let described = self.answer(&mut |_| Ok(())).await?;
        let mut columns = Vec::with_capacity(described.columns.len());
        for (name, oid) in described.columns {
            let kind = match value::kind(oid) {
                Some(kind) => kind,
                None => Box::pin(self.look_up(oid)).await?,
            };
            columns.push(Column { name, kind });
        }
        let plan = Arc::new(match whose {
            Whose::Guest => Plan::of_guest(name, columns, text),
            Whose::Host => Plan::new(name, columns),
        });
        if keep {
            self.plans(whose).insert(text, types, plan.clone());
        }
        Ok(plan)
    }

    /// A type that came with an extension or a migration.
    async fn look_up(&mut self, oid: Oid) -> Result<Kind, Failure> {
        const TYPE: &str = "SELECT typname::text, typtype = 'e' OR typname = 'citext' FROM pg_catalog.pg_type WHERE oid = $1::int8::oid";
        let mut parameters = Parameters::default();
        parameters.int8(oid.into());
        let rows = Box::pin(self.ask(TYPE, &parameters)).await?;
        let found = rows.first().map(|row| value::kind_of_row(row));
        Ok(found.unwrap_or_else(|| Kind::other(&oid.to_string())))
    }

    /// Runs a statement and answers how many rows it affected.
    pub(super) async fn run(
        &mut self,
        plan: &Plan,
        parameters: &Parameters,
        take: Take<'_>,
    ) -> Result<u64, Failure> {
        self.queue(plan, parameters)?;
        self.finish(take).await
    }

    /// The rows of a statement of the host's own, which may be large.
    pub(super) async fn ask(
        &mut self,
        text: &str,
        parameters: &Parameters,
    ) -> Result<Vec<Vec<Value>>, Failure> {
        let mut rows = Vec::new();
        let plan = self.plan(Whose::Host, text, parameters.types()).await?;
        (self.wire.limit, self.wire.patience) = (MAX_ROW_BYTES, MAX_ROW_BYTES);
        let done = self
            .run(&plan, parameters, &mut |row| {
                rows.push(value::row(&plan.columns, row)?);
                Ok(())
            })
            .await;
        (self.wire.limit, self.wire.patience) = (MAX_MESSAGE_BYTES, MAX_UNWANTED_BYTES);
        done.map(|_| rows)
    }

    /// Commands before, a statement of the host's own, and a command after, in one trip. What comes after one that failed finds
    /// the transaction failed.
    pub(super) async fn run_between(
        &mut self,
        before: Option<&str>,
        (text, parameters): (&str, &Parameters),
        after: &str,
    ) -> Result<(Result<(), Failure>, Result<(), Failure>), Failure> {
        let plan = match self.plan(Whose::Host, text, parameters.types()).await {
            Ok(plan) => plan,
            // Its transaction has failed with it.
            Err(failure @ Failure::Lost(_)) => return Err(failure),
            Err(failure) => return Ok((Err(failure), self.command(after).await)),
        };
        if let Some(before) = before {
            self.queue_command(before)?;
        }
        self.queue(&plan, parameters)?;
        self.sync();
        self.queue_command(after)?;
        self.flush().await?;
        let mut first = Ok(());
        if before.is_some() {
            first = self.settle().await?;
        }
        let second = self.settle().await?;
        let after = self.settle().await?;
        Ok((first.and(second), after))
    }

    /// The next answer, unless there is none.
    async fn settle(&mut self) -> Result<Result<(), Failure>, Failure> {
        match self.answer(&mut |_| Ok(())).await {
            Ok(_) => Ok(Ok(())),
            Err(failure @ Failure::Lost(_)) => Err(failure),
            Err(failure) => Ok(Err(failure)),
        }
    }

    /// A statement that goes out with the next [`Client::finish`].
    pub(super) fn queue(&mut self, plan: &Plan, parameters: &Parameters) -> Result<(), Failure> {
        let output = &mut self.wire.output;
        let begin = output.len();
        output.put_u8(b'B');
        output.put_i32(0);
        // The portal without a name.
        output.put_u8(0);
        output.put_slice(plan.name.as_bytes());
        output.put_u8(0);
        // All parameters are binary,
        output.put_slice(&[0, 1, 0, 1]);
        parameters.write(output);
        // and all columns of the answer.
        output.put_slice(&[0, 1, 0, 1]);
        let length = i32::try_from(output.len() - begin - 1);
        let Ok(length) = length else {
            output.truncate(begin);
            let why = "the parameters have more than 2 GiB";
            return Err(Error::Unsupported(why.to_owned()).into());
        };
        output[begin + 1..begin + 5].copy_from_slice(&length.to_be_bytes());
        frontend::execute("", 0, output).map_err(lost)
    }

    /// Bytes that are queued.
    pub(super) fn queued(&self) -> usize {
        self.wire.output.len()
    }

    /// Sends what is queued, and answers how many rows all of it has affected.
    pub(super) async fn finish(&mut self, take: Take<'_>) -> Result<u64, Failure> {
        self.sync();
        self.flush().await?;
        let answer = self.answer(take).await?;
        Ok(answer.affected)
    }

    /// Has all statements prepared anew.
    pub(super) async fn forget_plans(&mut self) -> Result<(), Failure> {
        let own = self.own_plans.take_names();
        for name in self.plans.take_names().into_iter().chain(own) {
            frontend::close(b'S', &name, &mut self.wire.output).map_err(lost)?;
        }
        self.finish(&mut |_| Ok(())).await.map(drop)
    }

    fn plans(&mut self, whose: Whose) -> &mut Plans {
        match whose {
            Whose::Guest => &mut self.plans,
            Whose::Host => &mut self.own_plans,
        }
    }

    fn sync(&mut self) {
        self.opens = false;
        frontend::sync(&mut self.wire.output);
        self.open += 1;
    }

    /// Sends what is queued, and reads the answers to what goes before.
    async fn flush(&mut self) -> Result<(), Failure> {
        if let Err(error) = self.wire.flush().await {
            // That the server leaves, it may have said.
            let farewell = self.farewell().await;
            return Err(farewell.unwrap_or_else(|| lost(error)));
        }
        while self.before > 0 {
            self.before -= 1;
            let done = self.answer(&mut |_| Ok(())).await;
            done.map_err(Failure::lost)?;
        }
        Ok(())
    }

    fn hear(&mut self, body: &ErrorResponseBody) -> Spoken {
        let spoken = Spoken::read(body);
        self.is_spent |= spoken.ends_session();
        spoken
    }

    async fn farewell(&mut self) -> Option<Failure> {
        match self.wire.next().await {
            Ok(Incoming::Message(Message::ErrorResponse(body))) => Some(self.hear(&body).failure()),
            _ => None,
        }
    }

    /// Reads to the end of an exchange. Once something has failed, rows are thrown away, up to a bound.
    async fn answer(&mut self, take: Take<'_>) -> Result<Answer, Failure> {
        let mut answer = Answer::default();
        let mut failed = None;
        let mut unwanted = 0;
        for count in 1_u32.. {
            if count.is_multiple_of(MESSAGES_A_TURN) {
                tokio::task::consume_budget().await;
            }
            let message = match self.wire.next().await {
                Ok(Incoming::Message(message)) => message,
                Ok(Incoming::TooLarge(length)) => {
                    unwanted += length;
                    failed.get_or_insert(too_large());
                    is_bearable(unwanted)?;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                    return Err(too_large().lost());
                }
                Err(error) => return Err(lost(error)),
            };
            match message {
                Message::DataRow(row) if failed.is_none() => {
                    failed = take(&row).err().map(Failure::Statement);
                }
                Message::DataRow(row) => {
                    unwanted += row.buffer().len();
                    is_bearable(unwanted)?;
                }
                Message::RowDescription(body) => answer.columns = columns(&body).map_err(lost)?,
                Message::CommandComplete(_) if self.opening > 0 => self.opening -= 1,
                Message::CommandComplete(body) => {
                    answer.affected += affected(body.tag().map_err(lost)?);
                }
                Message::ErrorResponse(body) => match self.hear(&body).failure() {
                    failure @ Failure::Lost(_) => return Err(failure),
                    failure if self.opening > 0 => return Err(failure.lost()),
                    failure => failed = Some(failed.unwrap_or(failure)),
                },
                // What it means by a quote is what the host means when it reads a statement.
                Message::ParameterStatus(body) if body.name().is_ok_and(|name| name == QUOTES) => {
                    if !body.value().is_ok_and(|value| value == "on") {
                        let why = format!("{QUOTES} was changed in the session");
                        return Err(lost(io::Error::other(why)));
                    }
                }
                Message::ReadyForQuery(body) => {
                    self.in_transaction = body.status() != b'I';
                    self.open = self.open.saturating_sub(1);
                    break;
                }
                Message::BindComplete
                | Message::CloseComplete
                | Message::EmptyQueryResponse
                | Message::NoData
                | Message::NoticeResponse(_)
                | Message::NotificationResponse(_)
                | Message::ParameterDescription(_)
                | Message::ParameterStatus(_)
                | Message::ParseComplete => {}
                _ => return Err(lost(io::Error::other("the server's answer is unexpected"))),
            }
        }
        match failed {
            None => Ok(answer),
            Some(failure) => Err(failure),
        }
    }
}

fn too_large() -> Failure {
    Failure::Statement(Error::TooLarge(MAX_ANSWER_BYTES as u64))
}

fn is_bearable(unwanted: usize) -> Result<(), Failure> {
    match unwanted <= MAX_UNWANTED_BYTES {
        true => Ok(()),
        false => Err(too_large().lost()),
    }
}

fn columns(body: &RowDescriptionBody) -> io::Result<Vec<(String, Oid)>> {
    let fields = body.fields();
    fields
        .map(|field| Ok((field.name().to_owned(), field.type_oid())))
        .collect()
}

/// What a command's tag ends with: `INSERT 0 3`, `SELECT 3`, `CREATE TABLE`.
fn affected(tag: &str) -> u64 {
    let last = tag.rsplit(' ').next();
    last.and_then(|last| last.parse().ok()).unwrap_or_default()
}

fn lost(error: io::Error) -> Failure {
    Failure::Lost(Error::Unavailable(error.to_string()))
}
