//! What a fuzzer hands over, as choices.

/// Bytes that are used up from the front; where none is left, every choice is the first.
#[derive(Debug, Clone, Copy)]
pub struct Feed<'a>(&'a [u8]);

impl<'a> Feed<'a> {
    /// Choices out of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all are used up.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is left, at most `most` bytes.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        first
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Eight bytes as a number.
    pub fn word(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.take(8);
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    /// One of `n`, from as few bytes as can tell them apart. 0 of none.
    pub fn below(&mut self, n: usize) -> usize {
        let mut drawn = usize::from(self.byte());
        if n > 1 << 8 {
            drawn |= usize::from(self.byte()) << 8;
        }
        if n > 1 << 16 {
            drawn |= usize::from(self.byte()) << 16;
        }
        drawn.checked_rem(n).unwrap_or(0)
    }

    /// One of a list that is not empty.
    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// A number that counts, lengths and offsets should not be, or might be.
    pub fn number(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::from(self.byte()),
            2 => 1 << self.below(64),
            3 => u64::MAX - u64::from(self.byte() % 4),
            4 => u64::from(u32::MAX) + u64::from(self.byte() % 2),
            5 => i64::MAX as u64,
            6 => u64::from(self.byte()) << 8 | u64::from(self.byte()),
            _ => self.word(),
        }
    }

    /// Some text; what is no UTF-8 is replaced.
    pub fn text(&mut self, most: usize) -> String {
        String::from_utf8_lossy(self.take(most)).into_owned()
    }
}
