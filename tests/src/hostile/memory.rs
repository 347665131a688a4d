//! A global allocator that counts what each thread holds, so that an input that makes the product reserve more than
//! it may is found although nothing is written there. A program that wants it counted installs [`Counting`].

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// A single reservation that no input may lead to: it is reported before the system can kill the process for it.
const HUGE: usize = 1 << 30;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting.
pub struct Counting;

fn changed(by: isize) {
    // Not there any more while the thread ends.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + by);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

fn watch(size: usize) {
    if size > HUGE {
        super::drive::give_up(&format!("{size} bytes were asked for at once"));
    }
}

#[expect(unsafe_code, reason = "an allocator can't be written without; it only counts and passes on")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        changed(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        changed(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        changed(-(layout.size() as isize));
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        watch(size);
        changed(size as isize - layout.size() as isize);
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Begins to look for this thread's peak; tells what it holds now.
pub fn begin() -> isize {
    let held = HELD.get();
    MOST.set(held);
    held
}

/// The most that this thread has held above `before` since it began; 0 without [`Counting`].
pub fn most_above(before: isize) -> usize {
    (MOST.get() - before).max(0) as usize
}
