//! One file of a partition: record batches one after another, named by the offset of the first.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::batch::{BadBatch, HEADER_LEN, Header};

pub(crate) const EXTENSION: &str = "log";

/// At most this many bytes lie between two entries of the index, but for batches that are larger.
pub(crate) const INDEX_EVERY: u64 = 4096;

const WALK_BUFFER: usize = 256 << 10;

/// A segment file and its index. Only the writer of the partition appends to it.
#[derive(Debug)]
pub(crate) struct Segment {
    base_offset: i64,
    path: PathBuf,
    /// Open while the segment is written to; the others are opened for each read.
    file: Option<Arc<File>>,
    len: u64,
    next_offset: i64,
    max_timestamp: i64,
    index: Vec<IndexEntry>,
}

/// Where a batch begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IndexEntry {
    pub(crate) offset: i64,
    pub(crate) position: u64,
    /// The largest timestamp of the batches before this one.
    max_timestamp_before: i64,
}

/// What walking a file from its start found.
pub(crate) struct Walk {
    /// The segment up to the end or to the first byte that is no good batch.
    pub(crate) segment: Segment,
    /// Why the walk ended before the end of the file.
    pub(crate) bad: Option<BadBatch>,
    /// Bytes in the file.
    pub(crate) file_len: u64,
}

/// Reads a file batch by batch.
pub(crate) struct Batches<'a> {
    reader: BufReader<&'a File>,
    position: u64,
    end: u64,
    expected: i64,
    depth: Depth,
    bytes: Vec<u8>,
}

/// How much of each batch a walk reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// The header.
    Headers,
    /// All, to compare the checksum.
    Checksums,
}

impl Segment {
    /// A new file. The caller makes its name durable.
    pub(crate) fn create(folder: &Path, base_offset: i64) -> io::Result<Self> {
        Self::create_at(path_of(folder, base_offset, EXTENSION), base_offset)
    }

    /// A new file under another name. One of this name can only be one whose creation was not finished.
    pub(crate) fn create_at(path: PathBuf, base_offset: i64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        Ok(Self {
            file: Some(Arc::new(file)),
            ..Self::empty(path, base_offset)
        })
    }

    /// The segment files of a folder, in order.
    pub(crate) fn list(folder: &Path) -> io::Result<Vec<(i64, PathBuf)>> {
        list(folder, EXTENSION)
    }

    /// Gives the file its name, and the segment that path.
    pub(crate) fn rename(&mut self, extension: &str) -> io::Result<()> {
        let to = self.path.with_extension(extension);
        fs::rename(&self.path, &to)?;
        self.path = to;
        Ok(())
    }

    /// Reads a file from its start, and calls `seen` for each good batch.
    pub(crate) fn walk(
        base_offset: i64,
        path: PathBuf,
        depth: Depth,
        mut seen: impl FnMut(&Header),
    ) -> io::Result<Walk> {
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let file_len = file.metadata()?.len();
        let mut segment = Self::empty(path, base_offset);
        let mut batches = Batches::new(&file, base_offset, file_len, depth);
        let mut bad = None;
        while let Some(next) = batches.next()? {
            match next {
                Ok(header) => {
                    seen(&header);
                    segment.note(&header);
                }
                Err(reason) => {
                    bad = Some(reason);
                    break;
                }
            }
        }
        drop(batches);
        segment.file = Some(Arc::new(file));
        Ok(Walk {
            segment,
            bad,
            file_len,
        })
    }

    fn empty(path: PathBuf, base_offset: i64) -> Self {
        Self {
            base_offset,
            path,
            file: None,
            len: 0,
            next_offset: base_offset,
            max_timestamp: -1,
            index: Vec::new(),
        }
    }

    pub(crate) fn base_offset(&self) -> i64 {
        self.base_offset
    }

    /// The offset after the last record.
    pub(crate) fn next_offset(&self) -> i64 {
        self.next_offset
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The largest timestamp of a record, -1 without records.
    pub(crate) fn max_timestamp(&self) -> i64 {
        self.max_timestamp
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a whole batch at the end. After an error nothing of it is left.
    pub(crate) fn append(&mut self, batch: &[u8], header: &Header) -> io::Result<()> {
        let file = self.file()?;
        if let Err(error) = file.write_all_at(batch, self.len) {
            file.set_len(self.len)?;
            return Err(error);
        }
        self.note(header);
        Ok(())
    }

    /// Finds out whether there is room for so many bytes more, and leaves none of them.
    pub(crate) fn try_room(&mut self, len: u64) -> io::Result<()> {
        let file = self.file()?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let tried = file.write_all_at(&vec![0; len], self.len);
        file.set_len(self.len)?;
        tried
    }

    /// Cuts off what is after the last good batch.
    pub(crate) fn cut(&self) -> io::Result<()> {
        let file = self.file()?;
        file.set_len(self.len)?;
        file.sync_all()
    }

    /// The open file, or the file opened.
    pub(crate) fn file(&self) -> io::Result<Arc<File>> {
        match &self.file {
            Some(file) => Ok(file.clone()),
            None => Ok(Arc::new(
                OpenOptions::new().read(true).write(true).open(&self.path)?,
            )),
        }
    }

    /// Has what comes written elsewhere, where it fails.
    #[cfg(test)]
    pub(crate) fn replace_file(&mut self, file: File) {
        self.file = Some(Arc::new(file));
    }

    /// Closes the file of a segment that is written to no more.
    pub(crate) fn close(&mut self) {
        self.file = None;
    }

    /// Where to read on to find the batch of `offset`, which is in this segment.
    pub(crate) fn seek_offset(&self, offset: i64) -> IndexEntry {
        self.entry_before(|entry| entry.offset <= offset)
    }

    /// Where to read on to find the first batch with a record that is not older than `timestamp`.
    pub(crate) fn seek_timestamp(&self, timestamp: i64) -> IndexEntry {
        self.entry_before(|entry| entry.max_timestamp_before < timestamp)
    }

    fn entry_before(&self, is_before: impl Fn(&IndexEntry) -> bool) -> IndexEntry {
        let start = IndexEntry {
            offset: self.base_offset,
            position: 0,
            max_timestamp_before: -1,
        };
        let count = self.index.partition_point(is_before);
        count
            .checked_sub(1)
            .and_then(|last| self.index.get(last))
            .copied()
            .unwrap_or(start)
    }

    fn note(&mut self, header: &Header) {
        if self
            .index
            .last()
            .is_none_or(|last| self.len - last.position >= INDEX_EVERY)
        {
            self.index.push(IndexEntry {
                offset: header.first_offset(),
                position: self.len,
                max_timestamp_before: self.max_timestamp,
            });
        }
        self.len += header.len as u64;
        self.next_offset = header.next_offset();
        self.max_timestamp = self.max_timestamp.max(header.max_timestamp);
    }
}

fn path_of(folder: &Path, base_offset: i64, extension: &str) -> PathBuf {
    folder.join(format!("{base_offset:020}.{extension}"))
}

/// The files of a folder that are named by an offset and end so, in order.
pub(crate) fn list(folder: &Path, extension: &str) -> io::Result<Vec<(i64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|has| has == extension)
            && let Some(base) = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok())
        {
            found.push((base, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

impl<'a> Batches<'a> {
    /// The batches of the first `end` bytes of a file that begins at `base_offset`.
    pub(crate) fn new(file: &'a File, base_offset: i64, end: u64, depth: Depth) -> Self {
        Self {
            reader: BufReader::with_capacity(WALK_BUFFER, file),
            position: 0,
            end,
            expected: base_offset,
            depth,
            bytes: Vec::new(),
        }
    }

    /// The next batch, or why what is there is none; nothing can be read after that.
    pub(crate) fn next(&mut self) -> io::Result<Option<Result<Header, BadBatch>>> {
        let left = self.end - self.position;
        if left == 0 {
            return Ok(None);
        }
        if left < HEADER_LEN as u64 {
            return Ok(Some(Err(BadBatch::Short)));
        }
        self.bytes.resize(HEADER_LEN, 0);
        self.reader.read_exact(&mut self.bytes)?;
        let header = match Header::parse(&self.bytes) {
            Ok(header) if header.len as u64 > left => return Ok(Some(Err(BadBatch::Short))),
            Ok(header) => header,
            Err(reason) => return Ok(Some(Err(reason))),
        };
        if header.first_offset() != self.expected {
            let (expected, found) = (self.expected, header.first_offset());
            return Ok(Some(Err(BadBatch::Offset { expected, found })));
        }
        if self.depth == Depth::Headers {
            self.reader
                .seek_relative((header.len - HEADER_LEN) as i64)?;
        } else {
            self.bytes.resize(header.len, 0);
            self.reader.read_exact(&mut self.bytes[HEADER_LEN..])?;
            if let Err(reason) = header.verify(&self.bytes) {
                return Ok(Some(Err(reason)));
            }
        }
        self.position += header.len as u64;
        self.expected = header.next_offset();
        Ok(Some(Ok(header)))
    }

    /// The bytes of the batch that came last.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Walk {
    /// Whether there is a good, later batch after the place where the walk ended. The end of a process leaves no such
    /// thing behind; the end of the machine may, in what was not flushed; damage to what was flushed looks the same.
    pub(crate) fn good_batch_follows(&self) -> io::Result<bool> {
        let from = self.segment.len;
        let mut rest = vec![0; usize::try_from(self.file_len - from).unwrap_or(0)];
        self.segment.file()?.read_exact_at(&mut rest, from)?;
        let is_good = |at: usize| {
            let bytes = &rest[at..];
            Header::parse(bytes).is_ok_and(|header| {
                header.base_offset > self.segment.next_offset && header.verify(bytes).is_ok()
            })
        };
        Ok((1..rest.len().saturating_sub(HEADER_LEN)).any(is_good))
    }
}
