//! Sequences that make way for others where there is not memory for all of them.

use super::{Batch, End, Progress, Room, Running, Ticket, guarded};
use crate::{Error, Result, Session, SnapshotError, SnapshotStore};
use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

/// Passes for which somebody waits, and for which somebody else has run, before they change places.
pub const TURN: u64 = 64;

/// Where sequences are put that make way, and under which names.
pub(super) struct Parking {
    store: Arc<dyn SnapshotStore>,
    /// Names of this batch's, and of no other's that uses the same store.
    name: String,
    next: AtomicU64,
}

/// A sequence that has made way.
pub(super) struct Parked {
    key: String,
    progress: Progress,
    read_so_far: usize,
}

impl Parking {
    pub(super) fn new(store: Arc<dyn SnapshotStore>) -> Self {
        static BATCHES: AtomicU64 = AtomicU64::new(0);
        let batch = BATCHES.fetch_add(1, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let nanos = now.map_or(0, |since| since.as_nanos());
        Self {
            store,
            name: format!("parked-{nanos:x}-{:x}-{batch:x}", process::id()),
            next: AtomicU64::new(0),
        }
    }

    pub(super) fn forget(&self, parked: &Parked) {
        // What is left behind takes room there, and hinders nobody.
        let _ = self.store.remove(&parked.key);
    }
}

impl Batch {
    /// Lets whoever has run for longest make way for the first in the line, if that has waited for long.
    pub(super) fn take_turns(&mut self) {
        if self.waiting.is_empty() || self.parking.is_none() {
            self.blocked = 0;
            return;
        }
        self.blocked += 1;
        if self.blocked < TURN {
            return;
        }
        let now = self.load.passes;
        let ran = |running: &Running| now - running.since;
        let victims = self.running.iter().enumerate();
        let victims = victims.filter(|(_, running)| {
            running.ended.is_none() && !running.awaits && ran(running) >= TURN
        });
        let longest = victims.max_by_key(|(_, running)| (ran(running), running.id));
        if let Some(at) = longest.map(|(at, _)| at) {
            self.park(at);
            self.admit();
        }
    }

    fn park(&mut self, at: usize) {
        let Some(parking) = &self.parking else { return };
        let number = parking.next.fetch_add(1, Ordering::Relaxed);
        let key = format!("{}-{number:x}", parking.name);
        let session = &self.running[at].session;
        let put = || parking.store.put(&key, &mut |to| session.write(to));
        if guarded(put).is_err() {
            // It goes on where it is, until its turn to make way comes again: a full disk ends nobody's sequence,
            // and is not full for ever.
            self.running[at].since = self.load.passes;
            self.load.stayed += 1;
            return;
        }
        let running = self.running.remove(at);
        self.load.parked += 1;
        self.front.waiting.fetch_add(1, Ordering::AcqRel);
        self.waiting.push_back(Ticket {
            id: running.id,
            request: running.request,
            sink: running.sink,
            bytes: running.bytes.max(running.room.bytes()),
            parked: Some(Parked {
                key,
                read_so_far: running.session.tokens().len(),
                progress: running.progress,
            }),
        });
    }

    /// Takes a sequence up again.
    pub(super) fn take_up(&mut self, ticket: Ticket, parked: Parked, room: Room) {
        match guarded(|| self.fetch_parked(&ticket, &parked)) {
            Ok(session) => {
                if let Some(parking) = &self.parking {
                    parking.forget(&parked);
                }
                self.run(ticket, session, room, parked.progress);
            }
            Err(error) => {
                drop(room);
                let ticket = Ticket {
                    parked: Some(parked),
                    ..ticket
                };
                self.turn_away(ticket, End::Failed(error));
            }
        }
    }

    fn fetch_parked(&self, ticket: &Ticket, parked: &Parked) -> Result<Session> {
        let lost = || SnapshotError::Damaged(format!("{} is not there any more", parked.key));
        let stored = match &self.parking {
            Some(parking) => parking.store.get(&parked.key)?,
            None => None,
        };
        let mut stored = stored.ok_or_else(lost)?;
        let (model, request) = (self.front.model.clone(), &ticket.request);
        let session = Session::read(
            model,
            request.policy.clone(),
            request.cache,
            &mut *stored.from,
            stored.length,
        )?;
        match session.tokens().len() == parked.read_so_far {
            true => Ok(session),
            false => Err(Error::from(lost())),
        }
    }
}
