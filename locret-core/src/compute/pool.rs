//! Host memory that is written again and again while a pass is under way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buffers that are waiting for their next use.
///
/// What is asked of the system anew has to be cleared page by page, on one thread: 5 to 8 % of the time
/// of a prompt. Buffers stay only while a pass is under way ([`open`](Self::open)); between passes a pool
/// is empty.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    passes: usize,
    free: Vec<Vec<f32>>,
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on buffers are kept, until the guard is dropped.
    pub(super) fn open(&self) -> Open<'_> {
        self.state().passes += 1;
        Open(self)
    }

    /// `len` numbers of no particular value.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let mut state = self.state();
        let free = &mut state.free;
        let fits = |buffer: &&mut Vec<f32>| buffer.capacity() >= len;
        let best = free.iter_mut().filter(fits).map(|b| b.capacity()).min();
        // One that is far too large would be missed by whoever needs it.
        let best = best.filter(|capacity| *capacity <= 2 * len);
        // The one that was used last: it may still be in a cache.
        let at = best.and_then(|n| free.iter().rposition(|buffer| buffer.capacity() == n));
        let values = at.map(|at| free.remove(at));
        drop(state);
        let values = match values {
            Some(mut values) => {
                values.resize(len, 0.0);
                values
            }
            None => vec![0.0; len],
        };
        Buffer {
            values,
            pool: Some(self.clone()),
        }
    }
}

/// Ends the keeping of buffers when dropped.
pub(super) struct Open<'a>(&'a Pool);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.passes -= 1;
        if state.passes == 0 {
            state.free = Vec::new();
        }
    }
}

/// Numbers in host memory; their memory goes back to the pool that they are from.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) values: Vec<f32>,
    pool: Option<Arc<Pool>>,
}

impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        Self { values, pool: None }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool
            && self.values.capacity() > 0
        {
            let mut state = pool.state();
            if state.passes > 0 {
                state.free.push(std::mem::take(&mut self.values));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_while_a_pass_is_under_way_and_not_after_it() {
        let pool = Arc::new(Pool::default());
        let open = pool.open();
        let first = pool.take(100);
        let address = first.values.as_ptr();
        drop(first);
        assert_eq!(pool.state().free.len(), 1);
        // Far too large for 10 numbers, and right for 90.
        assert_ne!(pool.take(10).values.as_ptr(), address);
        let again = pool.take(90);
        assert_eq!((again.values.as_ptr(), again.values.len()), (address, 90));
        drop(again);
        let inner = pool.open();
        drop(inner);
        assert!(!pool.state().free.is_empty());
        drop(open);
        assert!(pool.state().free.is_empty());
        drop(pool.take(100));
        assert!(pool.state().free.is_empty());
    }
}
