//! What the operating system says of this process's memory.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// The process's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// In memory now, pages of mapped files among it.
    pub resident: usize,
    /// In memory now without pages of files: heap, stacks, and whatever else no file holds.
    pub anonymous: usize,
    /// The most that ever was resident, pages of mapped files among it.
    pub peak: usize,
}

impl Memory {
    /// The figures of this moment; `None` where the system does not tell (it does on Linux).
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/status").ok()?)
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let mut lines = status.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: usize = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(kib * 1024)
        };
        Some(Self {
            resident: field("VmRSS")?,
            anonymous: field("RssAnon")?,
            peak: field("VmHWM")?,
        })
    }
}

/// Looks at the anonymous memory every few milliseconds, since the system keeps no peak of it.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<usize>,
}

impl Watch {
    /// Begins to look.
    pub fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        let thread = thread::spawn(move || {
            let mut most = 0;
            loop {
                // Once more after the end, so that there is a figure of it.
                let last = asked.load(Relaxed);
                most = most.max(Memory::now().map_or(0, |m| m.anonymous));
                if last {
                    return most;
                }
                thread::sleep(Duration::from_millis(2));
            }
        });
        Self { stop, thread }
    }

    /// The most anonymous memory since the start, in bytes; 0 where the system does not tell.
    pub fn stop(self) -> usize {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_a_status() {
        let status =
            "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t     8 kB\nRssAnon:\t 4 kB\nRssFile:\t 4 kB\n";
        let memory = Memory {
            resident: 8 << 10,
            anonymous: 4 << 10,
            peak: 2 << 20,
        };
        assert_eq!(Memory::parse(status), Some(memory));
        assert_eq!(Memory::parse("VmHWM: 1 kB\nVmRSS: 1 kB\n"), None);
        assert_eq!(Memory::parse("VmHWM: x kB"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_block_of_memory_is_seen() {
        // So much that what other tests allocate and free beside it does not matter.
        const BYTES: usize = 256 << 20;
        let before = Memory::now().unwrap();
        let watch = Watch::start();
        let block = std::hint::black_box(vec![1u8; BYTES]);
        let during = Memory::now().unwrap();
        thread::sleep(Duration::from_millis(50));
        drop(block);
        let most = watch.stop();
        assert!(during.anonymous >= before.anonymous + BYTES / 2);
        assert!(during.resident >= during.anonymous);
        assert!(most >= before.anonymous + BYTES / 2, "{most}");
        // The system counts in batches, so that its figures are some pages apart.
        assert!(Memory::now().unwrap().peak >= during.resident - (4 << 20));
    }
}
