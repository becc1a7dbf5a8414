//! The codecs of record batches: gzip, snappy, lz4 and zstd, as Kafka's clients write them.

use std::io::{self, Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use lz4_flex::frame::{BlockSize, FrameDecoder, FrameEncoder, FrameInfo};

const NONE: i16 = 0;
const GZIP: i16 = 1;
const SNAPPY: i16 = 2;
const LZ4: i16 = 3;
const ZSTD: i16 = 4;

/// Bytes that the records of one batch may have when they are not compressed: nobody waits for a bomb to unfold.
pub(crate) const MAX_UNCOMPRESSED: u64 = 256 << 20;

/// What Java's clients put before snappy's blocks, each of which follows its length: a name, a version and the oldest
/// version that can be read. Others write one block and nothing before it.
const SNAPPY_FRAME: &[u8] = b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01";
const SNAPPY_NAME_LEN: usize = 8;
/// As Java's clients cut their blocks.
const SNAPPY_BLOCK: usize = 32 << 10;

/// A block says first how long its content is, and memory is set aside for it. Three bytes stand for 64 at most.
const MAX_SNAPPY_RATIO: usize = 22;

/// Reads what a codec wrote.
pub(crate) fn decoder(codec: i16, bytes: &[u8]) -> io::Result<Box<dyn Read + '_>> {
    Ok(match codec {
        NONE => Box::new(bytes),
        GZIP => Box::new(GzDecoder::new(bytes).take(MAX_UNCOMPRESSED)),
        SNAPPY if bytes.starts_with(&SNAPPY_FRAME[..SNAPPY_NAME_LEN]) => {
            let blocks = bytes.get(SNAPPY_FRAME.len()..).ok_or(Short)?;
            let blocks = SnappyBlocks {
                blocks,
                block: io::Cursor::default(),
            };
            Box::new(blocks.take(MAX_UNCOMPRESSED))
        }
        SNAPPY => Box::new(io::Cursor::new(snappy_block(bytes)?)),
        LZ4 => Box::new(FrameDecoder::new(bytes).take(MAX_UNCOMPRESSED)),
        ZSTD => Box::new(zstd::stream::read::Decoder::with_buffer(bytes)?.take(MAX_UNCOMPRESSED)),
        other => return Err(io::Error::other(format!("there is no codec {other}"))),
    })
}

/// Writes with a codec.
pub(crate) enum Encoder {
    None(Vec<u8>),
    Gzip(GzEncoder<Vec<u8>>),
    /// What waits for its block, and the blocks.
    Snappy(Vec<u8>, Vec<u8>),
    Lz4(Box<FrameEncoder<Vec<u8>>>),
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
}

impl Encoder {
    pub(crate) fn new(codec: i16) -> io::Result<Self> {
        Ok(match codec {
            NONE => Self::None(Vec::new()),
            GZIP => Self::Gzip(GzEncoder::new(Vec::new(), Compression::default())),
            SNAPPY => Self::Snappy(Vec::new(), SNAPPY_FRAME.to_vec()),
            LZ4 => {
                // Blocks that do not look back, which is all that Java's clients read.
                let info = FrameInfo::new().block_size(BlockSize::Max64KB);
                Self::Lz4(Box::new(FrameEncoder::with_frame_info(info, Vec::new())))
            }
            ZSTD => Self::Zstd(zstd::stream::write::Encoder::new(
                Vec::new(),
                zstd::DEFAULT_COMPRESSION_LEVEL,
            )?),
            other => return Err(io::Error::other(format!("there is no codec {other}"))),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::None(into) => into.write_all(bytes),
            Self::Gzip(into) => into.write_all(bytes),
            Self::Snappy(waiting, into) => {
                waiting.extend_from_slice(bytes);
                if waiting.len() >= SNAPPY_BLOCK {
                    write_snappy_block(waiting, into)?;
                }
                Ok(())
            }
            Self::Lz4(into) => into.write_all(bytes),
            Self::Zstd(into) => into.write_all(bytes),
        }
    }

    pub(crate) fn finish(self) -> io::Result<Vec<u8>> {
        match self {
            Self::None(bytes) => Ok(bytes),
            Self::Gzip(into) => into.finish(),
            Self::Snappy(mut waiting, mut into) => {
                write_snappy_block(&mut waiting, &mut into)?;
                Ok(into)
            }
            Self::Lz4(into) => into.finish().map_err(io::Error::other),
            Self::Zstd(into) => into.finish(),
        }
    }
}

/// The bytes end too early.
#[derive(Debug, thiserror::Error)]
#[error("what is compressed ends too early")]
struct Short;

impl From<Short> for io::Error {
    fn from(short: Short) -> Self {
        Self::new(io::ErrorKind::UnexpectedEof, short)
    }
}

/// Snappy's blocks, one after the other.
struct SnappyBlocks<'a> {
    blocks: &'a [u8],
    block: io::Cursor<Vec<u8>>,
}

impl Read for SnappyBlocks<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.block.read(into)?;
            if read > 0 || into.is_empty() || self.blocks.is_empty() {
                return Ok(read);
            }
            let (len, rest) = self.blocks.split_first_chunk().ok_or(Short)?;
            let len = u32::from_be_bytes(*len) as usize;
            let (block, rest) = rest.split_at_checked(len).ok_or(Short)?;
            self.block = io::Cursor::new(snappy_block(block)?);
            self.blocks = rest;
        }
    }
}

fn snappy_block(block: &[u8]) -> io::Result<Vec<u8>> {
    let len = snap::raw::decompress_len(block)?;
    if len > block.len().saturating_mul(MAX_SNAPPY_RATIO) {
        return Err(io::Error::other(format!("a block of {len} bytes")));
    }
    Ok(snap::raw::Decoder::new().decompress_vec(block)?)
}

fn write_snappy_block(waiting: &mut Vec<u8>, into: &mut Vec<u8>) -> io::Result<()> {
    if waiting.is_empty() {
        return Ok(());
    }
    let block = snap::raw::Encoder::new().compress_vec(waiting)?;
    into.extend_from_slice(&(block.len() as u32).to_be_bytes());
    into.extend_from_slice(&block);
    waiting.clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_cut_is_said() {
        let text: Vec<u8> = (0..100_000u32).map(|i| (i / 7 % 251) as u8).collect();
        for codec in NONE..=ZSTD {
            let mut encoder = Encoder::new(codec).unwrap();
            text.chunks(1000)
                .for_each(|chunk| encoder.write(chunk).unwrap());
            let bytes = encoder.finish().unwrap();
            let mut read = Vec::new();
            decoder(codec, &bytes)
                .unwrap()
                .read_to_end(&mut read)
                .unwrap();
            assert!(read == text, "codec {codec}");
            let cut = &bytes[..bytes.len() / 2];
            let mut read = Vec::new();
            let _ = decoder(codec, cut).and_then(|mut decoder| decoder.read_to_end(&mut read));
            assert!(read.len() < text.len(), "codec {codec}");
        }
    }

    /// As librdkafka writes it.
    #[test]
    fn a_bare_block_of_snappy_is_read() {
        let block = snap::raw::Encoder::new()
            .compress_vec(b"abcabcabc")
            .unwrap();
        let mut read = Vec::new();
        decoder(SNAPPY, &block)
            .unwrap()
            .read_to_end(&mut read)
            .unwrap();
        assert_eq!(read, b"abcabcabc");
    }

    #[test]
    fn a_bomb_does_not_unfold() {
        let mut encoder = Encoder::new(ZSTD).unwrap();
        let zeros = vec![0; 1 << 20];
        for _ in 0..=MAX_UNCOMPRESSED >> 20 {
            encoder.write(&zeros).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        let unfolded = io::copy(&mut decoder(ZSTD, &bomb).unwrap(), &mut io::sink()).unwrap();
        assert_eq!(unfolded, MAX_UNCOMPRESSED);
        // A block of snappy says its length first: 2 GiB.
        assert!(decoder(SNAPPY, &[0x80, 0x80, 0x80, 0x80, 8, 0]).is_err());
    }
}
