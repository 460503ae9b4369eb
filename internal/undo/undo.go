// Package undo rolls back what a failed operation has done so far.
package undo

import "fmt"

// Stack is a list of undo steps. The zero value is ready.
type Stack struct {
	steps []func() error
}

// Push adds a step that undoes what was just done.
func (s *Stack) Push(step func() error) { s.steps = append(s.steps, step) }

// Run is deferred with a pointer to the named error result. If it is not nil,
// Run calls the steps, the last pushed first, all of them even if some fail.
// Failures are added to the text of *err but not to its chain, so that
// errors.Is still tells what failed first.
func (s *Stack) Run(err *error) {
	if *err == nil {
		return
	}
	for i := len(s.steps) - 1; i >= 0; i-- {
		if uerr := s.steps[i](); uerr != nil {
			*err = fmt.Errorf("%w (rollback: %v)", *err, uerr)
		}
	}
	s.steps = nil
}
