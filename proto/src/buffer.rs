//! Large buffers for block data, from a pool that each thread keeps.
//!
//! The system's allocator gives buffers of this size back to the kernel as soon as they are free, and every page of
//! the next one costs a fault and a clearing: more than the copying of its data. A buffer that has been
//! [`freeze`]d comes back to the pool of the thread that drops its last handle. Smaller ones are the allocator's.

use std::cell::RefCell;

use bytes::Bytes;

/// Buffers of fewer bytes are the allocator's.
const SMALLEST: usize = 16 << 10;
/// Buffers of more bytes are, too: no request is larger.
const LARGEST: usize = 1 << 20;
/// Sizes that are kept: powers of two.
const CLASSES: usize = (LARGEST / SMALLEST).ilog2() as usize + 1;
/// Bytes that a thread's pool keeps at most (R11): what a volume's mirrors let go with one flush.
const KEPT: usize = 16 << 20;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool::new()) };
}

struct Pool {
    free: [Vec<Vec<u8>>; CLASSES],
    /// How many of each class there were at least since [`release_idle`] was called last.
    idle: [usize; CLASSES],
    /// Bytes in all of them.
    kept: usize,
}

impl Pool {
    const fn new() -> Self {
        Self { free: [const { Vec::new() }; CLASSES], idle: [0; CLASSES], kept: 0 }
    }
}

/// The class whose buffers hold `len` bytes, if there is one.
fn class_for(len: usize) -> Option<usize> {
    (SMALLEST..=LARGEST).contains(&len).then(|| (len.next_power_of_two() / SMALLEST).ilog2() as usize)
}

/// An empty buffer with room for at least `len` bytes.
pub fn take(len: usize) -> Vec<u8> {
    let mut buffer = take_any(len);
    buffer.clear();
    buffer
}

/// A buffer of exactly `len` bytes, which hold anything: for whoever overwrites all of them.
pub fn take_filled(len: usize) -> Vec<u8> {
    let mut buffer = take_any(len);
    buffer.resize(len, 0);
    buffer
}

/// Gives the buffer room for `len` bytes in all.
pub fn enlarge(buffer: &mut Vec<u8>, len: usize) {
    if buffer.capacity() < len {
        let mut larger = take(len);
        larger.extend_from_slice(buffer);
        drop(freeze(std::mem::replace(buffer, larger)));
    }
}

/// A buffer with room for `len` bytes, as long as its last user left it.
fn take_any(len: usize) -> Vec<u8> {
    let Some(class) = class_for(len) else { return Vec::with_capacity(len) };
    // At a thread's end its pool is gone before all of its buffers are.
    let kept = POOL.try_with(|pool| {
        let mut pool = pool.borrow_mut();
        let buffer = pool.free[class].pop()?;
        pool.idle[class] = pool.idle[class].min(pool.free[class].len());
        pool.kept -= buffer.capacity();
        Some(buffer)
    });
    kept.ok().flatten().unwrap_or_else(|| Vec::with_capacity(SMALLEST << class))
}

/// The buffer's contents, to be shared; its memory goes back to a pool with the last handle.
pub fn freeze(buffer: Vec<u8>) -> Bytes {
    let capacity = buffer.capacity();
    if class_for(capacity).is_some() && capacity.is_power_of_two() {
        Bytes::from_owner(Pooled(buffer))
    } else {
        Bytes::from(buffer)
    }
}

/// Frees what this thread's pool kept without need since the last call. Call it about once a second.
pub fn release_idle() {
    // A thread that ends has none any more.
    let _ = POOL.try_with(|pool| {
        let Pool { free, idle, kept } = &mut *pool.borrow_mut();
        for (class, (free, idle)) in free.iter_mut().zip(idle).enumerate() {
            free.truncate(free.len() - *idle);
            *kept -= *idle * (SMALLEST << class);
            *idle = free.len();
        }
    });
}

struct Pooled(Vec<u8>);

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        let (capacity, class) = (buffer.capacity(), class_for(buffer.capacity()));
        let class = class.expect("only such buffers are pooled");
        // At a thread's end the allocator takes it.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.kept + capacity <= KEPT {
                pool.kept += capacity;
                pool.free[class].push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests may share a thread.
    fn empty_pool() {
        POOL.with(|pool| *pool.borrow_mut() = Pool::new());
    }

    fn kept() -> usize {
        POOL.with(|pool| pool.borrow().kept)
    }

    #[test]
    fn a_frozen_buffer_comes_back_and_is_given_out_again() {
        empty_pool();
        let mut buffer = take(100_000);
        assert_eq!((buffer.len(), buffer.capacity()), (0, 128 << 10));
        buffer.resize(100_000, 7);
        let at = buffer.as_ptr();
        let bytes = freeze(buffer);
        let slice = bytes.slice(10..20);
        drop(bytes);
        assert_eq!(kept(), 0, "a slice still uses it");
        assert_eq!(&slice[..], &[7; 10]);
        drop(slice);
        assert_eq!(kept(), 128 << 10);
        let again = take(80_000);
        assert_eq!((again.as_ptr(), again.len(), kept()), (at, 0, 0));
        drop(freeze(again));
        assert_eq!(take_filled(70_000).len(), 70_000);
    }

    #[test]
    fn a_filled_buffer_has_its_length_whatever_its_last_user_left() {
        empty_pool();
        for left in [0, 5, 65_536] {
            let mut buffer = take(65_536);
            buffer.resize(left, 1);
            drop(freeze(buffer));
            for len in [40_000, 65_536, 65_535] {
                let buffer = take_filled(len);
                assert_eq!(buffer.len(), len);
                drop(freeze(buffer));
            }
        }
    }

    #[test]
    fn an_enlarged_buffer_keeps_what_it_holds() {
        empty_pool();
        let mut buffer = take(20_000);
        buffer.extend_from_slice(&[3; 10_000]);
        enlarge(&mut buffer, 15_000);
        assert_eq!((buffer.capacity(), kept()), (32 << 10, 0));
        enlarge(&mut buffer, 1 << 20);
        assert_eq!((buffer.capacity(), kept()), (1 << 20, 32 << 10));
        assert_eq!(buffer, [3; 10_000]);
    }

    #[test]
    fn sizes_outside_the_classes_are_the_allocators() {
        empty_pool();
        for len in [0, 1, 4096, SMALLEST - 1, LARGEST + 1] {
            let mut buffer = take(len);
            assert!(buffer.capacity() >= len);
            buffer.resize(len, 1);
            drop(freeze(buffer));
        }
        assert_eq!(kept(), 0);
        // Not made here, but of a size that is kept: welcome.
        drop(freeze(vec![0; SMALLEST]));
        assert_eq!(kept(), SMALLEST);
    }

    #[test]
    fn a_pool_keeps_no_more_than_its_limit() {
        empty_pool();
        let buffers: Vec<Bytes> = (0..40).map(|_| freeze(take_filled(LARGEST))).collect();
        drop(buffers);
        assert_eq!(kept(), KEPT);
    }

    #[test]
    fn what_was_not_needed_since_the_last_call_is_released() {
        empty_pool();
        let buffers: Vec<Bytes> = (0..3).map(|_| freeze(take_filled(65_536))).collect();
        drop(buffers);
        release_idle();
        assert_eq!(kept(), 3 << 16, "they came since the last call");
        let used = take(65_536);
        drop(freeze(used));
        release_idle();
        assert_eq!(kept(), 1 << 16, "one was needed");
        release_idle();
        assert_eq!(kept(), 0);
    }
}
