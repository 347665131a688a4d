//! Which leases may live: the leader's table (R1, R3).
//!
//! A gateway counts its lease from when it *sent* the request; the leader counts from when it *received* it, on a
//! clock that runs while the machine sleeps (CLOCK_BOOTTIME), and longer by the assumed drift. So every lease ends
//! before the leader takes it to have ended. What is to be shown is:
//!
//! > **A session is judged to have ended its lease only if no renewal under its epoch, or an older one, that was
//! > or will be granted by any leader was sent less than a lease time before.**
//!
//! *Grants of this leader.* [`LeaseTable::received`] notes the lease when the request arrives, before the quorum
//! round whose end grants it. A judgement made while the round is on its way therefore counts it. Notes are never
//! taken back; a round that fails leaves one that is too careful by one lease time.
//!
//! *Grants of earlier leaders.* An earlier leader grants only after a quorum answered a round that began after the
//! request arrived. A voter that answered it did so before it voted for us, and the two quorums share one, so the
//! request was sent before we were elected. Hence nothing an earlier leader ever granted, however late it does so,
//! outlives one lease time after [`LeaseTable::lead`], and until then every session may have a lease, except where
//! the metadata itself says otherwise: never opened, or closed by its owner and *settled* (no older lease could
//! live when it was opened).
//!
//! *Grants of later leaders.* A verdict must not be used after another leader could have granted. The command
//! carries the term in which it was judged, and the machine carries it out only in an entry of that term. A later
//! leader grants after it has applied everything that a quorum may have kept of our entries (its read index is at
//! least the entry that begins its term): either our opening is applied by then, and the older epoch refused, or
//! it is never committed. A leader that was stopped (SIGSTOP) between judgement and proposal, and has been deposed
//! since, would pass its proposal on to the new leader: there its entry gets the new term, and is judged again. An
//! opening of another gateway that was committed in between is seen by the epoch that was judged.
//!
//! *Grants after the judgement.* From the proposal ([`LeaseTable::opening`]) until its outcome is known, renewals
//! under the older epochs are refused, also those whose round was already on its way. Within the term an appended
//! entry has an outcome; when the term ends the whole table does.
//!
//! *Which epochs.* A take-over opens a session while the older lease lives, and the new owner waits it out by
//! itself (R3); it may close before that. So leases are kept per epoch, a close forgets its own only, and the
//! wait told to the owner of epoch *e* is that of the longest lease of any epoch below *e*.

use std::collections::{BTreeMap, BTreeSet};

use proto::cluster::{SessionState, VolumeSession};
use proto::id::{Epoch, VolumeId};
use proto::limits::{CLOCK_DRIFT_PERMILLE, LEASE_MS};
use proto::mutant::{self, Mutant};
use uuid::Uuid;

/// Milliseconds of CLOCK_BOOTTIME.
pub type BootMs = u64;

/// How long the leader takes a lease to live: twice the assumed drift, one clock slow and the other fast.
pub const FULL_LEASE_MS: u64 = LEASE_MS + LEASE_MS * 2 * CLOCK_DRIFT_PERMILLE / 1000 + 1;

/// The table of a member; empty unless it leads.
#[derive(Debug, Default)]
pub struct LeaseTable {
    /// The term led, and when this member found that it leads in it.
    leading: Option<(u64, BootMs)>,
    /// Until when a lease of this epoch may live.
    until: BTreeMap<VolumeId, BTreeMap<Epoch, BootMs>>,
    /// Openings proposed in this term whose outcome is not known, and the epoch they supersede.
    opening: BTreeMap<VolumeId, BTreeSet<(Uuid, Epoch)>>,
}

impl LeaseTable {
    /// This member leads in `term`: it has just found out that it was elected, or knows it already.
    pub fn lead(&mut self, term: u64, now: BootMs) {
        if self.leading.is_none_or(|(leading, _)| leading != term) {
            *self = Self { leading: Some((term, now)), ..Self::default() };
        }
    }

    /// This member does not lead: it knows nothing of leases.
    pub fn follow(&mut self) {
        if self.leading.is_some() {
            *self = Self::default();
        }
    }

    /// Since when this member leads.
    pub fn leading_since(&self) -> Option<BootMs> {
        self.leading.map(|(_, since)| since)
    }

    /// A renewal arrived. Call before the quorum round begins.
    pub fn received(&mut self, volume: VolumeId, epoch: Epoch, now: BootMs) {
        let leases = self.until.entry(volume).or_default();
        leases.retain(|_, until| *until > now);
        let until = leases.entry(epoch).or_default();
        *until = (*until).max(now + FULL_LEASE_MS);
    }

    /// The quorum round of a renewal ended, and `current` is the volume's session in state applied up to the read
    /// index: whether the lease is granted.
    pub fn may_grant(&self, volume: VolumeId, epoch: Epoch, gateway: &str, current: &VolumeSession) -> bool {
        let superseded = |openings: &BTreeSet<(Uuid, Epoch)>| openings.iter().any(|(_, old)| *old >= epoch);
        self.leading.is_some()
            && current.epoch == epoch
            && current.owner() == Some(gateway)
            && !self.opening.get(&volume).is_some_and(superseded)
    }

    /// For how long a lease of an epoch below `epoch` may live; `settled`: the metadata say that none granted by
    /// an earlier leader can.
    pub fn older_lease_ms(&self, volume: VolumeId, epoch: Epoch, settled: bool, now: BootMs) -> u64 {
        let Some((_, since)) = self.leading else { return FULL_LEASE_MS };
        let settled = settled || mutant::is(Mutant::NewLeaderForgets);
        let inherited = if settled { 0 } else { since + FULL_LEASE_MS };
        let own = self.until.get(&volume).into_iter().flat_map(|leases| leases.range(..epoch));
        own.map(|(_, until)| *until).fold(inherited, u64::max).saturating_sub(now)
    }

    /// Whether every lease under the volume's latest session, or an older one, has ended.
    pub fn ended(&self, volume: VolumeId, session: &VolumeSession, now: BootMs) -> bool {
        let settled = match session.state {
            SessionState::Never => true,
            SessionState::Closed { .. } => session.settled,
            SessionState::Open { .. } => false,
        };
        self.older_lease_ms(volume, session.epoch.next(), settled, now) == 0
    }

    /// An opening that supersedes `old` is being proposed by this leader.
    pub fn opening(&mut self, volume: VolumeId, request: Uuid, old: Epoch) {
        self.opening.entry(volume).or_default().insert((request, old));
    }

    /// The outcome of that opening is known: applied, or not appended.
    pub fn opened(&mut self, volume: VolumeId, request: Uuid) {
        if let Some(openings) = self.opening.get_mut(&volume) {
            openings.retain(|(known, _)| *known != request);
            if openings.is_empty() {
                self.opening.remove(&volume);
            }
        }
    }

    /// The owner of this session gave it up: it uses its lease no more.
    pub fn closed(&mut self, volume: VolumeId, epoch: Epoch) {
        if let Some(leases) = self.until.get_mut(&volume) {
            leases.remove(&epoch);
        }
    }

    /// Forgets what has ended.
    pub fn tick(&mut self, now: BootMs) {
        self.until.retain(|_, leases| {
            leases.retain(|_, until| *until > now);
            !leases.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: VolumeId = VolumeId(Uuid::from_u128(1));
    const R: Uuid = Uuid::from_u128(2);

    fn open(epoch: u64, gateway: &str) -> VolumeSession {
        let state = SessionState::Open { gateway: gateway.into() };
        VolumeSession { epoch: Epoch(epoch), state, settled: true }
    }

    fn closed(epoch: u64, settled: bool) -> VolumeSession {
        let state = SessionState::Closed { gateway: "a".into(), clean: true };
        VolumeSession { epoch: Epoch(epoch), state, settled }
    }

    /// A leader for so long that nobody else's grants live.
    fn old_leader() -> LeaseTable {
        let mut table = LeaseTable::default();
        table.lead(1, 0);
        table
    }
    const NOW: BootMs = 100_000;

    #[test]
    fn a_new_leader_assumes_that_open_sessions_have_a_lease() {
        let mut table = LeaseTable::default();
        table.lead(5, NOW);
        assert!(!table.ended(V, &open(1, "a"), NOW + FULL_LEASE_MS - 1));
        assert!(table.ended(V, &open(1, "a"), NOW + FULL_LEASE_MS));
        table.lead(5, NOW + 1000);
        assert!(table.ended(V, &open(1, "a"), NOW + FULL_LEASE_MS), "still the same term");
        table.lead(6, NOW + 1000);
        assert!(!table.ended(V, &open(1, "a"), NOW + FULL_LEASE_MS), "elected again: others may have led");
    }

    #[test]
    fn a_new_leader_believes_the_metadata_about_closed_sessions_if_they_were_settled() {
        let mut table = LeaseTable::default();
        table.lead(5, NOW);
        let never = VolumeSession { epoch: Epoch(0), state: SessionState::Never, settled: true };
        assert!(table.ended(V, &never, NOW));
        assert!(table.ended(V, &closed(1, true), NOW));
        assert!(!table.ended(V, &closed(1, false), NOW), "a taken-over lease may outlive the closed session");
    }

    #[test]
    fn a_renewal_counts_from_its_arrival_though_its_round_is_not_over() {
        let mut table = old_leader();
        assert!(table.ended(V, &open(1, "a"), NOW));
        table.received(V, Epoch(1), NOW);
        assert!(!table.ended(V, &open(1, "a"), NOW + FULL_LEASE_MS - 1));
        assert!(table.ended(V, &open(1, "a"), NOW + FULL_LEASE_MS));
    }

    #[test]
    fn nothing_is_granted_to_an_older_epoch_while_an_opening_is_in_flight() {
        let mut table = old_leader();
        table.received(V, Epoch(1), NOW);
        assert!(table.may_grant(V, Epoch(1), "a", &open(1, "a")));
        table.opening(V, R, Epoch(1));
        assert!(!table.may_grant(V, Epoch(1), "a", &open(1, "a")), "its round was on its way");
        table.opened(V, R);
        assert!(table.may_grant(V, Epoch(1), "a", &open(1, "a")), "the opening was refused");
        assert!(!table.may_grant(V, Epoch(1), "a", &open(2, "b")), "the opening was carried out");
        assert!(!table.may_grant(V, Epoch(2), "a", &open(2, "b")), "another gateway's");
        assert!(!table.may_grant(V, Epoch(1), "a", &closed(1, true)));
    }

    #[test]
    fn a_deposed_leader_grants_nothing_and_takes_all_leases_to_live() {
        let mut table = old_leader();
        table.follow();
        assert!(!table.may_grant(V, Epoch(1), "a", &open(1, "a")));
        assert!(!table.ended(V, &open(1, "a"), NOW));
        assert!(!table.ended(V, &closed(1, true), NOW));
    }

    #[test]
    fn a_take_over_that_closes_leaves_the_older_lease_to_be_waited_out() {
        let mut table = old_leader();
        table.received(V, Epoch(1), NOW);
        table.received(V, Epoch(2), NOW + 10);
        assert_eq!(table.older_lease_ms(V, Epoch(2), true, NOW + 10), FULL_LEASE_MS - 10);
        table.closed(V, Epoch(2));
        assert!(!table.ended(V, &closed(2, true), NOW + 20));
        assert_eq!(table.older_lease_ms(V, Epoch(3), true, NOW + 20), FULL_LEASE_MS - 20);
        assert!(table.ended(V, &closed(2, true), NOW + FULL_LEASE_MS));
    }

    #[test]
    fn a_lease_ends_for_the_gateway_before_it_ends_for_the_leader() {
        // The gateway's clock is slow and the leader's fast, by the assumed drift between them.
        let gateway_end_on_leader = LEASE_MS * (1000 + CLOCK_DRIFT_PERMILLE) / 1000;
        assert!(gateway_end_on_leader < FULL_LEASE_MS);
    }

    #[test]
    fn what_has_ended_is_forgotten() {
        let mut table = old_leader();
        table.received(V, Epoch(1), NOW);
        table.tick(NOW + FULL_LEASE_MS);
        assert!(table.until.is_empty());
    }
}
