//! Memory that is read from end to end for every token: in large pages where the system has them.

use bytes::{Buf, BytesMut};

/// The least and the most that is asked for at a time.
const BLOCK: std::ops::RangeInclusive<usize> = (2 << 20)..=(32 << 20);

/// A larger block is at most a sixteenth of what was given out before, so that little stays unused.
const PART: usize = 16;

/// Where vectors are best loaded from.
const LINE: usize = 64;

/// Room for many matrices, side by side.
///
/// A pass over all weights of a model touches more pages of the usual 4 KiB than a processor
/// remembers the addresses of, and reading them is then slower than the memory is. On Linux this
/// memory is advised to be in huge pages (as Transparent Huge Pages are given to who asks in most
/// configurations), for which matrices have to lie side by side: few of a small model fill a page.
#[derive(Debug, Default)]
pub struct Arena {
    block: BytesMut,
    given: usize,
}

impl Arena {
    /// `len` zeros at a multiple of 64 bytes. Once written,
    /// [`freeze`](BytesMut::freeze) makes them [`Bytes`](bytes::Bytes) that can be a
    /// [`Weight`](super::linear::Weight)'s; a block of memory is freed with the last of its parts.
    pub fn zeros(&mut self, len: usize) -> BytesMut {
        let padded = len.next_multiple_of(LINE);
        if self.block.capacity() < padded {
            let block = (self.given / PART).clamp(*BLOCK.start(), *BLOCK.end());
            self.block = BytesMut::with_capacity(padded.max(block) + LINE);
            in_large_pages(&mut self.block);
            let offset = self.block.as_ptr().align_offset(LINE).min(LINE);
            self.block.resize(offset, 0);
            self.block.advance(offset);
        }
        self.given += padded;
        self.block.resize(padded, 0);
        let mut part = self.block.split_to(padded);
        part.truncate(len);
        part
    }
}

/// Asks for large pages before a block is written to. Where there are none, nothing changes.
fn in_large_pages(block: &mut BytesMut) {
    #[cfg(target_os = "linux")]
    {
        /// Of the pages that addresses are given out in; larger ones are multiples.
        const PAGE: usize = 1 << 16;
        let room = block.spare_capacity_mut();
        let skip = room.as_ptr().align_offset(PAGE);
        let len = room.len().saturating_sub(skip) / PAGE * PAGE;
        if len > 0 {
            let start = room[skip..].as_mut_ptr();
            // SAFETY: the range lies within memory that is ours alone. The advice changes how it
            // is mapped, not what it holds.
            unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = block;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeros_at_cache_lines_and_do_not_touch() {
        let mut arena = Arena::default();
        let block = *BLOCK.start();
        let lengths = [1, 0, 64, 1000, block / 2, 65, block / 2, block + 7, 3];
        let parts: Vec<_> = (lengths.iter().enumerate())
            .map(|(i, len)| {
                let mut part = arena.zeros(*len);
                assert_eq!(part.len(), *len);
                assert!(part.iter().all(|b| *b == 0));
                assert_eq!(part.as_ptr().align_offset(LINE), 0);
                part.fill(i as u8 + 1);
                part.freeze()
            })
            .collect();
        for (i, part) in parts.iter().enumerate() {
            assert!(part.iter().all(|b| *b == i as u8 + 1), "part {i}");
        }
    }
}
